"""Named breakages of sound checkpoints that transformers, PEFT and trainers wrote, one for each code of doctor's."""
