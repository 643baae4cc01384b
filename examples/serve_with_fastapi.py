"""Pictures by HTTP, on this machine alone.

pip install fastapi uvicorn
python examples/serve_with_fastapi.py runs/half/pipeline     # then http://127.0.0.1:8000/pictures?seed=3&count=4
"""

import io
import sys
import threading
from typing import Annotated

from diffusers.utils import make_image_grid
from fastapi import FastAPI, Query, Response

from halfstep import StepAwarePipeline
from halfstep.core.bundled import model_of


def app_of(folder: str) -> FastAPI:
    pipe, one_at_a_time = StepAwarePipeline.from_pretrained(folder), threading.Lock()
    app = FastAPI(title="Halfstep")

    @app.get("/pictures")
    def pictures(
        seed: Annotated[int, Query(ge=0, lt=2**31)] = 0, count: Annotated[int, Query(ge=1, le=64)] = 4
    ) -> Response:
        """Pictures side by side: picture k of a seed is the same however many are asked for."""
        with one_at_a_time:  # a batch already uses all cores
            images = pipe(batch_size=count, seed=seed).images
        written = io.BytesIO()
        make_image_grid(images, rows=1, cols=count).save(written, "PNG")
        return Response(written.getvalue(), media_type="image/png")

    @app.get("/plan")
    def plan() -> dict:
        """What runs in every row, and what it costs."""
        return pipe.plan.to_json()

    return app


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app_of(sys.argv[1] if len(sys.argv) > 1 else str(model_of("fashion"))), host="127.0.0.1", port=8000)
