"""Networks: the Wan transformer, the video VAE, the text and image encoders."""
