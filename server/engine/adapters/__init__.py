"""LoRA and IA3 adapters in the flat batch: which products they change, their weights, and the products themselves."""
