"""Models and optimisation: device, base model, adapters, the loop and its checkpoints."""
