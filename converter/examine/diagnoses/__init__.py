"""Small independent functions that each name one fault, what proves it, what could fix it, and the next command."""
