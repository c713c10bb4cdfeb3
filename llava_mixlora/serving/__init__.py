"""`llava-mixlora serve`: models with their adapters, asked as OpenAI's interface asks."""
