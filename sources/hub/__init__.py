"""The Hugging Face Hub: addresses, repositories, transfers that resume, and shards that come and go."""
