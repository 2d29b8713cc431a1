"""Pictures from weights: zoos of LoRAs, the network that reads them, and the auditors beside it."""
