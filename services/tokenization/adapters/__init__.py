"""Tokenizers from files and packages on this machine. Nothing is downloaded."""
