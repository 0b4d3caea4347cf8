"""What the demo model is told: tables, triples, templates and the sentences made of them."""
