"""Records, files of them, token streams, packed batches and resumable loaders."""
