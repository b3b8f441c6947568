"""A small embedded world: 64 people and a bilingual grammar, told as raw text, as translation pairs and as chats.

The lowest floor of the package: it imports nothing else of it, and only `builders` imports a library that is not
in the standard one. The three data sets share their words and facts on purpose, so that what one training stage
teaches can be measured in the next: a chat may ask for a fact that only the raw text ever told.
"""
