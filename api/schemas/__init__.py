"""What the API answers, as pydantic models: the schemas of the OpenAPI document, and the one place where records become JSON.

The request body of a submit is not here: it is `nas.spec.SearchSpec` itself.
"""
