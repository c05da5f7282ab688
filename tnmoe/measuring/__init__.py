"""What runs emitted code: calibration, checks, measurements, tuning."""
