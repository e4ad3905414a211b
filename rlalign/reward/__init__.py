"""What a run is rewarded with: the verifier, reward models and their mixture; shaping, drift, reward-model training."""
