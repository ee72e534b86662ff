"""Exchange of weights: passports, encoder files, conversions."""
