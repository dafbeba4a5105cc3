"""The Python client: ServiceClient, TrainingClient, SamplingClient, RestClient."""
