"""Recipes: train, evaluate, pretrain, reproduce. The package imports nothing of them."""
