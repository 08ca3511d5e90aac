"""Interfaces of other libraries, each over the application's own mapped class.

``adapters.langchain`` and ``adapters.llamaindex``: a vector store and embeddings;
``adapters.haystack``: a document store and a retriever; ``adapters.advanced_alchemy``: ``nearest``
for repositories; ``adapters.mteb``: a search to benchmark. What they share is here: ``documents``
reads and writes rows as texts with metadata, ``filters`` translates conditions on metadata.
"""
