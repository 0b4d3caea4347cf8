"""How the demo model is made and measured: tokenizer, optimiser, training, evaluation, records, card."""
