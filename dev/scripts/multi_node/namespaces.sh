#!/usr/bin/env bash
# Two "hosts" on one machine: network namespaces, joined by a link of a bandwidth that tc limits. For tests and
# measurements of what a network does to a run; needs Linux and root. dev/doc/scaling.md's table was measured so:
#     bash dev/scripts/multi_node/namespaces.sh 1gbit python train_gpt2.py -e d6 -b 1 -t 1024 -x 4 -v 0 -s 0 --profile 1
set -euo pipefail
rate=$1
shift
folder=$(mktemp -d)

finish() {
  ip netns del llm0 2> /dev/null || true
  ip netns del llm1 2> /dev/null || true
  rm -rf "$folder" /etc/netns/llm0 /etc/netns/llm1
}
trap finish EXIT

ip netns add llm0
ip netns add llm1
ip -n llm0 link add link0 type veth peer name link0 netns llm1
for i in 0 1; do
  mkdir -p /etc/netns/llm$i
  printf '127.0.0.1 localhost\n10.77.0.1 llm0\n10.77.0.2 llm1\n' > /etc/netns/llm$i/hosts
  ip -n llm$i addr add 10.77.0.$((i + 1))/24 dev link0
  ip -n llm$i link set lo up
  ip -n llm$i link set link0 up
  ip netns exec llm$i tc qdisc add dev link0 root tbf rate "$rate" burst 1mb latency 400ms
done

# what mpirun calls instead of ssh: HOST COMMAND...
cat > "$folder/agent" << 'END'
#!/usr/bin/env bash
host=$1
shift
exec ip netns exec "$host" unshare --uts bash -c "hostname $host; $*"
END
chmod +x "$folder/agent"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
"$folder/agent" llm0 mpirun -np 2 -host llm0:1,llm1:1 --bind-to none --mca plm ssh --mca plm_ssh_agent "$folder/agent" \
  --mca pml ob1 --mca btl self,tcp --mca btl_tcp_if_include link0 \
  -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" -x PATH ${FLAGS:-} "$@"
