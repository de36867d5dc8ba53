"""Studies of the method, each a command: ablation, baselines, effects and others."""
