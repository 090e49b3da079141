"""Nothing of the papers' methods: what a trained ViT is worth where every pixel counts."""
