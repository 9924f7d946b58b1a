BEGIN TRANSACTION;
CREATE TABLE histograms (run INTEGER NOT NULL, number INTEGER NOT NULL, encoding TEXT NOT NULL, data BLOB NOT NULL,
                         PRIMARY KEY (run, number), FOREIGN KEY (run, number) REFERENCES rows ON DELETE CASCADE);
INSERT INTO "histograms" VALUES(1,0,'hdrhistogram-v2',X'484953544641414141436C346E4A4E706D537A4D774D44386B6745436D4B4530493544705A72426A41595039423667413079675942614E6732414D41484F514E43413D3D');
INSERT INTO "histograms" VALUES(2,0,'hdrhistogram-v2',X'4849535446414141414339346E4A4E706D537A4D774D4469797741427A464361456368304D396978674D482B41315341435159517246486D4B484F554F636F6B6D516B413133514D30513D3D');
CREATE TABLE rows (run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE, number INTEGER NOT NULL, name TEXT NOT NULL,
                   path TEXT NOT NULL, domains TEXT NOT NULL, mode TEXT, api TEXT NOT NULL, size INTEGER NOT NULL,
                   unit TEXT NOT NULL, figure REAL NOT NULL, row TEXT NOT NULL, PRIMARY KEY (run, number));
INSERT INTO "rows" VALUES(1,0,'rtt','ivshmem','process','poll','core',64,'ns',500.0,'{"name": "rtt", "path": "ivshmem", "domains": "process", "mode": "poll", "api": "core", "size": 64, "unit": "ns", "samples": 1000, "p50": 500, "p90": 900, "p99": 990, "p999": 999, "max": 1000, "per": 1, "clock_ns": 31.0, "warmup": 10, "rounds": [490, 510], "cpu": {"near": 0.1}, "late": 0}');
INSERT INTO "rows" VALUES(1,1,'stream','limit','process','pipeline','core',65536,'B/s',2000000000.0,'{"name": "stream", "path": "limit", "domains": "process", "mode": "pipeline", "api": "core", "size": 65536, "unit": "B/s", "samples": 2, "value": 2000000000.0, "per": 1, "warmup": 0, "rounds": [1000000000.0, 3000000000.0], "variant": "avx2, 8 slots", "variants": {"avx2, 8 slots": 2000000000.0}, "late": 0}');
INSERT INTO "rows" VALUES(2,0,'rtt','ivshmem','process','poll','core',64,'ns',550.0,'{"name": "rtt", "path": "ivshmem", "domains": "process", "mode": "poll", "api": "core", "size": 64, "unit": "ns", "samples": 1000, "p50": 550.0, "p90": 990.0000000000001, "p99": 1089.0, "p999": 1098.9, "max": 1100.0, "per": 1, "clock_ns": 31.0, "warmup": 10, "rounds": [539.0, 561.0], "cpu": {"near": 0.1}, "late": 0}');
INSERT INTO "rows" VALUES(2,1,'stream','limit','process','pipeline','core',65536,'B/s',2200000000.0,'{"name": "stream", "path": "limit", "domains": "process", "mode": "pipeline", "api": "core", "size": 65536, "unit": "B/s", "samples": 2, "value": 2200000000.0, "per": 1, "warmup": 0, "rounds": [1100000000.0, 3300000000.0000005], "variant": "avx2, 8 slots", "variants": {"avx2, 8 slots": 2200000000.0}, "late": 0}');
CREATE TABLE runs (id INTEGER PRIMARY KEY, started TEXT NOT NULL, accel TEXT NOT NULL, quick INTEGER NOT NULL,
                   facts TEXT NOT NULL);
INSERT INTO "runs" VALUES(1,'2026-01-01T00:00:00+00:00','none',1,'{
 "accel": "none",
 "host": {
  "cpu": "a processor",
  "cpus": 2,
  "kernel": "6.1",
  "commit": "0123456789abcdef0123",
  "dirty": false,
  "load_before": 0.1
 },
 "results": [],
 "accel_reason": "no VM took part",
 "quick": true,
 "started": "2026-01-01T00:00:00+00:00",
 "seconds": 9.5,
 "absent": [
  "vsock between VMs: vhost-vsock joins a VM and its host only"
 ],
 "schema": 1
}');
INSERT INTO "runs" VALUES(2,'2026-01-01T00:00:00+00:00','none',1,'{
 "accel": "none",
 "host": {
  "cpu": "a processor",
  "cpus": 2,
  "kernel": "6.1",
  "commit": "0123456789abcdef0123",
  "dirty": false,
  "load_before": 0.1
 },
 "results": [],
 "accel_reason": "no VM took part",
 "quick": true,
 "started": "2026-01-01T00:00:00+00:00",
 "seconds": 9.5,
 "absent": [
  "vsock between VMs: vhost-vsock joins a VM and its host only"
 ],
 "schema": 1
}');
CREATE INDEX by_key ON rows (name, path, domains, mode, api, size);
COMMIT;
PRAGMA user_version = 1;
