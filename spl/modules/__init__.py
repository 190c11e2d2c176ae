"""LightningModules: what is trained, with which loss and optimiser."""
