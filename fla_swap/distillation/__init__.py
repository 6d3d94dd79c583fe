"""Losses, stages and data that turn a swapped model into a faithful student of its original."""
