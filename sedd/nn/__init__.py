"""The parts `sedd.model.SEDDTransformer` is built from."""
