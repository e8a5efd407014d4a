"""Tokenization: how many tokens a conversation becomes, for every model, with how sure we are.

Owns: tokenizers, chat templates, the calibrated estimator, fitting a conversation into a window.
Promises: every count says its method, its tokenizer's version and an error bound; nothing is downloaded, ever.
Refuses: to guess in silence. A model without a matching tokenizer is counted by the estimator, and the count says `estimated`.
"""
