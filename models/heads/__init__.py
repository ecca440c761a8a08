"""Multi-source heads: a multispectral image and PAN to sharpened detail."""
