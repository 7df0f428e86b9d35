"""PEFT methods, one a file: each a value that says what its tensors are called and how an update is planned."""
