"""Front ends of :class:`dspark_runtime.Service`: an HTTP server that speaks OpenAI's API.

Needs the extra ``serve`` of dspark-runtime. It imports dspark_runtime, never torch. The service knows no HTTP; this
package knows no cache and no drafter.
"""
