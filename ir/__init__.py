"""What every part of bitwright shares: types, values, operators, text, meaning, targets, errors."""
