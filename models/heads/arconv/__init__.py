"""ARConv: `head` is the network, `adaptive` its convolution, `ranks` means and batch norms over all ranks."""
