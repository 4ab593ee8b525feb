"""The gRPC front: `baton.v1.Inference` as one more client of the edge."""
