"""TurboDiffusion: generate video with Wan models and their distilled, sparse and quantised students."""
