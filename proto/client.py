"""A client of a cluster in ten lines: submits a recipe and follows it step by step.

    python proto/client.py 127.0.0.1:7070 tiny.toml

Needs grpcio and grpcio-tools; run where the folder `contraflow/` of the protocol files can be imported from.
"""
import sys

import grpc

messages, services = grpc.protos_and_services("contraflow/v1/jobs.proto")
address, recipe = sys.argv[1:]
jobs = services.JobServiceStub(grpc.insecure_channel(address))
job = jobs.Submit(messages.SubmitRequest(recipe=open(recipe).read(), name="from-python")).job
for step in jobs.Watch(messages.WatchRequest(job=job)):
    print(step.record.step, step.record.loss, flush=True)
print(jobs.Get(messages.GetRequest(job=job)).job.outcome)
