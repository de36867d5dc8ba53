"""Installed as `hf_intervene.model_cards`, for the template."""
