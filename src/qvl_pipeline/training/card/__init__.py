"""The model card that lies beside a trained model."""
