"""Training a DSpark drafter for any target: prompts, the target's own responses, features, training, calibration."""
