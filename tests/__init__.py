"""Tests; README.md says where each goes."""
