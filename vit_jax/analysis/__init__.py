"""Numbers and pictures about trained models: metrics, attention, embeddings, figures, plots, traces."""
