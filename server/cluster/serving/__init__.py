"""The parts that Ray Serve runs. Nothing else in the project imports Ray."""
