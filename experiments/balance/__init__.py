"""Balancing methods compared: the same model, data order and seeds, one method after the other."""
