"""One exporter a file. Each names its variants and writes one graph for one family; `ROUTES` in `make` joins them."""
