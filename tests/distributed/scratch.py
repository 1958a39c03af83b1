exec(open("/tmp/cases.py").read())
if __name__ == "__main__":
    names = [n for n in CASES if len(sys.argv) < 3 or sys.argv[2] in n]
    for r in zip(*run_processes(int(sys.argv[1]), many, names)):
        print(*r[:1], [x[1] for x in r[1:]])
