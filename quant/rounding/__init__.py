"""What rounding weights takes from calibration: statistics of inputs, their second moments, error feedback."""
