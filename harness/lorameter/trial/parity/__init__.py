"""One adapter served in several ways, and how far their answers and logits lie apart."""
