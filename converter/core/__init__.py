"""The engine: lazy tensors, files, formats, computing and the writer. It knows no trainer, no LoRA, no Hub account."""
