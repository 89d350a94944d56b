"""What the table of methods says to people: `camserve methods`, docs/methods.md and the pictures of docs/methods/.

Everything is read off the code or tried out on small models, so that none of it can lie. Nothing here serves requests.
"""
