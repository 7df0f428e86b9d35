"""Small independent functions that each name one fault, what proves it, what could mend it, and the next command."""
