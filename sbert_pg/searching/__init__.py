"""The parts that ``search.nearest`` puts together: what is searched, index settings, stages."""
