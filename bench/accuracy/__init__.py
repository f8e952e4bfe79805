"""Experiments on word error rate."""
