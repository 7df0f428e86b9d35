"""The engine: lazy tensors, files, formats, computing and the writer. It knows no trainer, no LoRA and no Hub account."""
