"""From raw volumes to crops: read, check, prepare, store, crop, augment."""
